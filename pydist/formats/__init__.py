"""What the bytes are: sizes, tables of segments, the header of a message. NumPy alone."""
