"""What hosts a stream: the event loop, the server and its shutdown, the app's middleware stack."""
