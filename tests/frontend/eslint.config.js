import graphql from "@graphql-eslint/eslint-plugin";

const recommended = graphql.configs["flat/schema-recommended"].rules;
const OBJECT_TYPES = "ObjectTypeDefinition,ObjectTypeExtension";
const { [OBJECT_TYPES]: objectTypes, ...naming } =
  recommended["@graphql-eslint/naming-convention"][1];

export default [
  {
    files: ["gen/schema.graphql"],
    plugins: { "@graphql-eslint": graphql },
    languageOptions: {
      parser: graphql.parser,
      parserOptions: { graphQLConfig: { schema: "gen/schema.graphql" } },
    },
    rules: {
      ...recommended,
      // "Job type" is what the whole project calls it; it is a type of job, and not the GraphQL
      // type of a job, which the rule is about.
      "@graphql-eslint/naming-convention": [
        "error",
        {
          ...naming,
          "ObjectTypeDefinition[name.value!=/^(JobType|UnregisteredType)$/],ObjectTypeExtension": objectTypes,
        },
      ],
      // What a cache may keep by itself has an identity: a Job by its id, a JobType by its name.
      // All the others are values, parts of these, and answers.
      "@graphql-eslint/strict-id-in-types": [
        "error",
        {
          exceptions: {
            types: [
              "Backoff",
              "BehindInQueue",
              "ConcurrencyLimitReached",
              "IdempotencyConflict",
              "JobAttempt",
              "JobChanged",
              "JobCounts",
              "JobError",
              "JobEvent",
              "JobLease",
              "JobLogLine",
              "JobPolicy",
              "JobType",
              "JobTypeVersion",
              "JobValid",
              "LeaseLost",
              "NoWorkerSeen",
              "PageInfo",
              "PayloadMismatch",
              "ScheduledFor",
              "UnregisteredType",
              "Violation",
            ],
            suffixes: ["Conflict", "Connection", "Edge", "Invalid", "NotFound", "Success"],
          },
        },
      ],
    },
  },
];
