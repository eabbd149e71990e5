"""The live page: static files, sign-in, and a stream of what a running server does; fed only while a page is open."""
