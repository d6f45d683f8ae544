"""Every option, declared once, and how it is read. Needs no torch."""
