"""How do YAML files and overrides become one configuration?"""
