"""The one door to language models: the protocol, its providers, and the bounded tool-calling loop.

Owns: nothing but its name; import the module that is needed, so that no provider is loaded that is not used.
Deliberately does not know: what a tool does (``tools``), who asked for the run, how anything is traced.
"""
