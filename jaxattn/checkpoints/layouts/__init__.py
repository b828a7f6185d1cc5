"""What leaves are called: tables from stored names and axes to the decoder's."""
