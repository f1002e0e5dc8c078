"""Load a base and put it together with adapters, on a device."""
