"""Historical helpers behind ``bitsandbytes.functional`` that nothing else in this project uses."""
