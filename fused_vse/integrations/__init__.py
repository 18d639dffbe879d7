"""Stand-ins for the loss classes of other projects, one module a project; docs/ has a page on each.

Nothing here imports a third-party package until its module is imported, and `import fused_vse` imports
none of these modules.
"""
