"""A stand-in for a Kubernetes API server, and the trouble that one makes: no real one can be had where these tests run.

Its rules are those of the public documentation and of the sources:
https://kubernetes.io/docs/reference/using-api/api-concepts/,
https://kubernetes.io/docs/reference/using-api/server-side-apply/, api/openapi-spec/swagger.json (which list is a map,
and by what key), pkg/registry/core/pod/storage/eviction.go. The real kubectl and the real client talk to it.
"""
