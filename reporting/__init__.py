"""What a person opens: figures."""
