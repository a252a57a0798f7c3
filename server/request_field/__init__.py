"""The field `ficoco` of a request: what it may ask for, how it reaches tower and decoder, what the answer tells."""
