"""How bytes travel between ranks, below any codec."""
