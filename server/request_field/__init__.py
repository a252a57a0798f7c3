"""The request field `ficoco`: validation, translation for tower and decoder, and the report in the response."""
