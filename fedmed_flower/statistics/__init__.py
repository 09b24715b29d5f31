"""Statistics over several hospitals: what is asked, what may leave, what several give together."""
