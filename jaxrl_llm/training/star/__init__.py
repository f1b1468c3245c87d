"""STaR: its loop, its rationales, the files of its phases."""
