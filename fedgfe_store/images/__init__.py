"""A folder of finished images: the files, what they tell, and ways to look at them together."""
