"""Timing programs; the tables of the documentation come from them."""
