"""Models behind vLLM: our process asks, the engine's process reduces rows and sends them over a socket of ours."""
