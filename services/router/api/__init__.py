"""The OpenAI API: request and response objects, their validation, and errors as its clients expect them.

Fields that we do not implement are refused by name. Those that only keep books for the client (`user`,
`metadata`, `safety_identifier`, `prompt_cache_key`) are accepted and have no effect; those with one value
that we do implement (`store: false`, `service_tier: auto | default`, `best_of: 1`,
`modalities: ["text"]`) are accepted with that value.
"""
