"""What every run begins and ends with: loading, its folder, its errors, its summary."""
