"""Audit any Flower app: capture without touching it, check the assumptions, say what leaked."""
