"""The budget that holds a target agreement, in a server: second answers to some requests, compared with the first."""
