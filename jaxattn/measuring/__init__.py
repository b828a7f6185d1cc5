"""How long programs take: times of a device, named workloads, a table of choices of one's own."""
