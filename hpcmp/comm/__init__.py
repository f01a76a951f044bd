"""Moving arrays between ranks."""
