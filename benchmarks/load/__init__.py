"""Load for servers: what is asked of them and when, who asks, and what is made of the answers."""
