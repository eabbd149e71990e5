"""What a request passes before any route: socket, protocol, names, bodies, and whether the server is ready."""
