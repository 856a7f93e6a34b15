"""Whoever compares or grades answers, behind one interface, and the audit that a judge must pass."""
