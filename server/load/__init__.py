"""The load of the engines as vLLM reports it, shared by all API server processes of a server."""
