"""A few steps looked at closely: what held their memory, and what took their time."""
