"""Measurements, with the protocol that makes them worth publishing."""
