"""Chatting with a finished model.

serve       an OpenAI-compatible server for GGUF files and weights
chat        a page with base and tuned model side by side
client      a client of that API; the step deploy asks endpoints with it
"""
