"""Examples of boilermaker: run each from the checkout, as `python -m examples.NAME`."""
