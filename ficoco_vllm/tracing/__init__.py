"""What a request's reduction really did: recorded in the worker, fetched by the server, chained over the layers."""
