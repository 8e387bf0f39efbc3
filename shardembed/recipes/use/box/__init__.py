"""A small server of what a run was trained for. It is copied beside what it serves, and imports torch, starlette and uvicorn, and
nothing of shardembed.
"""
