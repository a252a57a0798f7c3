"""The load of the engines as vLLM reports it, seen alike by all API server processes of a server."""
