// Bundles each program for Node, as Vite bundles a frontend.
import { transformAsync } from "@babel/core";
import { readdirSync } from "node:fs";
import { defineConfig, type Plugin } from "vite";

/** Replaces the `graphql` tags of Relay with the code that its compiler generated. */
const relay: Plugin = {
  name: "relay",
  enforce: "pre",
  async transform(code, id) {
    if (!id.endsWith("programs/relay.ts")) return null;
    const parserOpts = { plugins: ["typescript" as const] };
    const plugins = [["relay", { eagerEsModules: true }]];
    return (await transformAsync(code, { filename: id, parserOpts, plugins }))?.code ?? null;
  },
};

export default defineConfig({
  plugins: [relay],
  build: {
    ssr: true,
    target: "node20",
    rollupOptions: {
      input: readdirSync("src/programs")
        .filter((name) => name.endsWith(".ts"))
        .map((name) => `src/programs/${name}`),
    },
  },
  ssr: { noExternal: true },
});
