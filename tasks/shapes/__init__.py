"""The embedded world of colored shapes: everything that the toolkit needs to run, and learn, on two CPU cores."""
