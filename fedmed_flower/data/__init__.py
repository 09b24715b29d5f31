"""Sites and their rows: public datasets, partitions, generated images."""
