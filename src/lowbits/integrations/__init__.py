"""What other libraries' objects mean here; each module is the only one that knows its library."""
