"""What a person reads after a run: tables, pictures, pages. What is written here is also read here."""
