"""The server side: a Flower strategy that plans rounds, sends requests and averages replies."""
