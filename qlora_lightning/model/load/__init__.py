"""A base loaded and put together with adapters, on a device."""
