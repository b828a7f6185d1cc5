"""How bytes lie: a file per format, each of which gives names, shapes and arrays."""
