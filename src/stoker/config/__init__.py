"""What the user asked for: the YAML's schema, loading, cross-field rules."""
