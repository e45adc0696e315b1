"""Many runs from one YAML, and the table that compares them."""
