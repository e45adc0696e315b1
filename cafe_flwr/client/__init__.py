"""The client side: a Flower ClientApp that answers messages for the clients of its node."""
