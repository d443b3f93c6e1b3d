"""What a comparison tells of itself, while it runs and afterwards: data frames, tables, pictures, the report."""
