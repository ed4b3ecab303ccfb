"""The embedded world of coloured shapes: everything that the toolkit needs to run, and learn, on two CPU cores."""
