"""A shop that takes orders. Its jobs confirm, invoice and settle them."""
