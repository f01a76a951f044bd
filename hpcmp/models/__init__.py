"""Models: compositions of layers, with no backward of their own."""
