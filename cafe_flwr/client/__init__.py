"""The ClientApp: what a node does with the messages it gets."""
