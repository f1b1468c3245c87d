"""What training needs of a slice, from its compiled programs, without the slice."""
